"""What is fast, and what it is compared with: ratios, measured side by side in one run."""
