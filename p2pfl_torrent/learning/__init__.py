"""Models, data and training: the only room that imports torch.

    state      a torch module as named arrays and back
    wrappers   models and names without what torch.compile and DataParallel put around them
    proximal   FedProx's penalty on leaving the round's start
    scaffold   SCAFFOLD's corrected gradients and control variates
    gradients  statistics of the gradients of the user's training, per chunk
    samples    gradients of samples apart from the training
    norms      norm policies and recomputed running statistics
    datasets   digits, MNIST from IDX files, whatever torchvision has
    partition  who gets which samples: iid, dirichlet(alpha), label_skew(labels)
    models     small networks, built from a seed
    trainer    deterministic local training and evaluation
    recipes    the tuned defaults of the demo and the benchmarks

Nothing is imported here, so that `datasets` and `partition`, which need only numpy, stay light.
"""
