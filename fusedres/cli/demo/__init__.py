"""The main job, end to end: a patched ResNet trains on real images. Run by `fusedres demo`."""
