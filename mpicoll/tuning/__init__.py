"""What ``algorithm="auto"`` goes by: rules, the profiles that keep them in files, and how measurements make them."""
