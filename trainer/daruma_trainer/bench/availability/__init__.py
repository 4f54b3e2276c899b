"""`daruma bench availability`: training while servers, workers or the store are away."""
