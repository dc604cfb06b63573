"""How the parameters of a trial are chosen: at random, by TPE, by CMA-ES, or from a grid."""
