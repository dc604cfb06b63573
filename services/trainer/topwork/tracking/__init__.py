"""Followers of a run: event files for TensorBoard, and MLflow. They never stop a run and never slow it down."""
