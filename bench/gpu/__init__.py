"""What is measured on a GPU; ``bench/gpu.sh`` runs it all."""
