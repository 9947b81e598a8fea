"""Training on the device: one state or many at once, many steps per compiled call."""
