"""What lies behind `daruma.join()`: an I/O thread, host copies, held pushes, a torch front."""
