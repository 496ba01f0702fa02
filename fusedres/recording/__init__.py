"""A block's pass, recorded once and then run without Python: `recorder` writes down what ran, `replays` runs it."""
