"""What several backends have in common: slices, the vendor's products, and the structs that compiled libraries take."""
