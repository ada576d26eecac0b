"""What `app` needs of HTTP beside its routes: bodies, signatures, problems, ranges, OpenAPI."""
