"""Wire formats: one module for the endpoints of one API."""
