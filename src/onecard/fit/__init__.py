"""`onecard fit`: say what there is room for, and get a model that fits, with its proof."""
