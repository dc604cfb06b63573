"""A job in a Kubernetes cluster: the objects that it is made of, and what they tell about how it goes."""
