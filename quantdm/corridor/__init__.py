"""The whole way: an embedded pipeline walks in, a smaller one with a report walks out."""
