"""Why residual blocks work: four measured studies. Run by `fusedres study`."""
