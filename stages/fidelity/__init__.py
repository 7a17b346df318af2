"""How well cached targets teach: gradients from them beside gradients from the full distribution."""
