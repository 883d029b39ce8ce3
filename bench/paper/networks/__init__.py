"""The networks of the paper in small, their data, and how they are trained."""
