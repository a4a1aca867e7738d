"""The reference pipelines that travel with the package, and the real images that they were trained on."""
