"""Sample from a model, erased or not."""
