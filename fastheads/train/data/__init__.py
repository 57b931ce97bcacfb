"""Images of several domains: where they lie (`domains`, `lists`), what they are (`images`), in `batches`."""
