"""The commands of ``qsens``, one module each: ``register`` declares it, ``run`` does it and returns its lines."""
