"""What concerns several processes: their ranks and layout, operations that all call together, devices, repeatable runs."""
