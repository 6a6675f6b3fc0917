"""HTTP below the APIs: connections, admission of requests, bodies, errors and streams."""
