"""What is shown of results: tables, comparisons, pictures, a report."""
