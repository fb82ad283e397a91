"""What hessdiag costs and how right it is, beside PyHessian, hessian-eigenthings and curvlinops."""
