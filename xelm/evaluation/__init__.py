"""What is measured of models and their mixtures, and the summaries of it. Knows no RUN."""
