"""Results as pages: of the demo, and one page of everything that was measured."""
