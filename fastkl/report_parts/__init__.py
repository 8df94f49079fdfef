"""The pieces of the report page: reading run folders, drawing charts, marking text, and the page's template."""
