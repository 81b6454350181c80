"""The fused operators: the functions of ``fastvit.reference.functional``, each with a ``backend`` to choose from."""
