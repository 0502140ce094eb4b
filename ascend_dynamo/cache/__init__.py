"""What is kept between calls and runs: gears (shape buckets) and cache keys."""
