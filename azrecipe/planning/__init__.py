"""Memory, time and price of training on machines only named."""
