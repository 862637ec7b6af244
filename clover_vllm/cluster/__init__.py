"""More than one engine: batches of requests, and serving with Ray. Ray is imported only where it is asked for."""
