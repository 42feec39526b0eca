"""What makes docs/: tables and pages from the code (`generate.py`), and a site that opens from disk (`mkdocs.yml`)."""
