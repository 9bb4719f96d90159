"""The inside of BERT-like networks: one view over the families, surgery on it, saving and loading."""
