"""How a head is chosen and scored: splits by image content, cross-validation, metrics with intervals."""
