"""`um3 serve`: a page to draw and to look at pictures with, and the small server behind it."""
