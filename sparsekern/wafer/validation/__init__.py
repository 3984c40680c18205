"""Public figures that the cost model is held to, and simulations of its parts."""
