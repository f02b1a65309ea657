"""What a deployed federation needs around Flower: keys, certificates, and a gate for its sites."""
