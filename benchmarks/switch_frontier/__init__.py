"""Switch SAEs against TopK SAEs on real activations, at equal width and at equal FLOPs."""
