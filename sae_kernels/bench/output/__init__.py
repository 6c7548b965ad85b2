"""Showing results: tables, comparisons, pictures and a page."""
