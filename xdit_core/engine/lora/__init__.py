"""LoRAs (Hu et al. 2021, arXiv:2106.09685): what their files add to weights, and how a request changes them."""
