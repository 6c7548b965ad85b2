"""Results shown: tables, comparisons, pictures and a page."""
