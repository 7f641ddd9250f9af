"""featcache: transfer learning that pays for the backbone once."""
