"""`cfpo check`: what of the library works on this machine, part by part, each in a process of its own."""
