"""From stored metrics to figures and tables; needs NumPy and Matplotlib only, the comparison SciPy too."""
