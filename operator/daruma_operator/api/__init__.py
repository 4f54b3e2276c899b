"""TrainingJob as types, and the CRD made from them."""
