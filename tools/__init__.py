"""Programs beside training and coding: benchmark, complexity, export, figures."""
