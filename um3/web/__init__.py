"""`um3 serve`: a web page that generates and captions images, and the server behind it."""
