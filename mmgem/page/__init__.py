"""A page to search, describe and point into a library of images."""
