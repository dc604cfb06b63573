"""Statistics of two classifiers on the same images: intervals of metrics and of their differences, and paired tests."""
