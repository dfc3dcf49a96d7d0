"""What methods learn: head scores, vectors, adapters, profiles, and the kit that a method gets for it."""
