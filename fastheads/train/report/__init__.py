"""What an experiment found, as one HTML page: `page` writes it, `record` works out the numbers, `figures` paints."""
